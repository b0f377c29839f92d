"""Making a model sparse, at once or in any training loop: methods, stages, what they take and what they report."""
