"""The embedded default: a demo benchmark made from real brain MRI templates, and a tiny LLaVA that reads it.

Nothing here knows the alignment method; the rest of the package meets the demo as records and a model folder.
"""
