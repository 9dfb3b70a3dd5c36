"""The commands of the front door: what each asks for and answers. Loaded when called."""
