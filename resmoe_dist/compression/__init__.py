"""From a source checkpoint to a compressed one: align, centre, encode, write, group by group."""
