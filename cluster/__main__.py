"""``python -m cluster`` is the ``paceline`` command."""

from cluster.cli import main

if __name__ == "__main__":
    main()
