"""`python -m npo_cli`: the same as `npo`, for launchers that start modules."""

from npo_cli.cli.main import main

if __name__ == "__main__":
    main()
