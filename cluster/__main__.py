"""`python -m cluster`: the offline command line, which knows nothing of serving."""

from cluster.cli import main

if __name__ == "__main__":
    main()
