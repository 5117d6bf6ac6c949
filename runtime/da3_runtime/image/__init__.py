"""Image bytes -> the network's input: fetch, decode, preprocess."""
