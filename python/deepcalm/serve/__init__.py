"""An OpenAI-compatible HTTP endpoint over one ``Batch``; needs the extra ``[serve]``."""
