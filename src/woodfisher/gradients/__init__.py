"""A model, its loss and its data → gradient rows, gradients and Hessian products of the chosen weights."""
