"""Knowledge amalgamation for dense prediction: the library behind the KAMAL Workbook."""

__version__ = "0.1.0"
