"""``python -m dspark_batch``: the command line."""

from dspark_batch.cli import main

if __name__ == "__main__":
    main()
