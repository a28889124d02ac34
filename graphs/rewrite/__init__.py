"""What passes are made of: nodes put in and replaced, weights found behind views, products in a scheme."""
