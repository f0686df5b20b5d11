from hypothesis import settings

# The first call of a codec may compile it, and machines are slow at times.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
