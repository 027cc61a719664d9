"""Make a trained model small: prune, cluster, quantize, and write it to disk as small as it is. Plain torch."""
