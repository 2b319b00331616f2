"""Process groups of the expert x tensor parallel grid, and moving tokens over it."""
