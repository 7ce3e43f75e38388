"""Records: what users have on disk or on the hub, in one shape."""

from taid_vlm.records.fingerprint import fingerprint
from taid_vlm.records.record import ImageRef, Malformed, Message, Record, parse_record
from taid_vlm.records.sources import Records, StreamedRecords, open_records, open_rows

__all__ = [
    "ImageRef",
    "Malformed",
    "Message",
    "Record",
    "Records",
    "StreamedRecords",
    "fingerprint",
    "open_records",
    "open_rows",
    "parse_record",
]
