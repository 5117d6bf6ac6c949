"""How the bundled model da3-nano is trained on rendered scenes. Not installed with the packages."""
