"""Is an engine's output that of upstream's own modules?"""
