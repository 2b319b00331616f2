"""What the README's figures are measured with. Not part of the installed package."""
