"""From graded responses, pairs or texts to new weights: updates, and the loop around them."""
