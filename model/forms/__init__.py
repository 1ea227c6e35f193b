"""Forms in which the weights of layers' linear maps are kept: one file a form, what `model.weights` names in a config."""
