"""Records: what users have on disk or on the hub, in one shape."""

from taid_vlm.records.fingerprint import fingerprint
from taid_vlm.records.images import ImageRef
from taid_vlm.records.messages import Message
from taid_vlm.records.mix import AnyRecords, MixedRecords, MixedStream, open_sources, parts_of
from taid_vlm.records.record import Malformed, Record, first_rows, parse_record
from taid_vlm.records.sources import Records, StreamedRecords, open_records, open_rows

__all__ = [
    "AnyRecords", "ImageRef", "Malformed", "Message", "MixedRecords", "MixedStream", "Record",
    "Records", "StreamedRecords", "fingerprint", "first_rows", "open_records", "open_rows",
    "open_sources", "parse_record", "parts_of",
]
