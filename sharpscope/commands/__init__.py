"""The commands: their flags (loaded at once, light), and what each does, without parsing and printing."""
