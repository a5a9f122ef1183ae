"""`python -m k2lab` is the `k2lab` command; `accelerate launch` starts training processes through it."""

from k2lab.cli import app

if __name__ == '__main__':
    app()
