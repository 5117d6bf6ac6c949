"""Raw outputs -> depth with a unit, and a camera."""
