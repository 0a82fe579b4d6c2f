"""The ground: the engine directory, and what everybody who writes or reads one agrees on. Imports errors alone."""
