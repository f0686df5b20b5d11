from contextlib import contextmanager
@contextmanager
def embedded_hot_tier(config, run_dir, progress):
    yield config, None
