"""The startup file of a kernel whose figures are compared. It runs among a notebook's names and leaves none there."""

__import__("runpy").run_path(__file__.replace("startup", "figures"))["register"](get_ipython())  # noqa: F821
