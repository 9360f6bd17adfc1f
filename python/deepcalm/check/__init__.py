"""Is it right? A packed model against its checkpoint, a numpy specification and a text."""
