"""Prints the table of the zoo."""

from avit_jax import zoo

if __name__ == "__main__":
    print(zoo.table(), end="")
