"""The log of the cases stream and stream-datasets; read by sides in environments of their own too."""

COLUMNS = ("user", "item", "label")
LOG = "log.parquet"
