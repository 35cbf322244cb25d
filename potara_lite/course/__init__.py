"""What the notebooks show: figures, sliders, exercises."""
