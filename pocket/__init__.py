"""
What the scripts share, in small files. Nothing is imported here, so that each script loads only
what it needs.
"""
