"""Prompts, documents, preferences and requests to attack: by name, from public sets or from files."""
