"""RLDS data sets as TFDS writes them, read without TensorFlow."""
