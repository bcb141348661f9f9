"""Pictures and tables: data in; Figure, DataFrame or Widget out."""
