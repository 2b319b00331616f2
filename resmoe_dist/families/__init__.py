"""Where each model keeps its experts: modules, disk names, layouts, activations."""
