"""The table: every peer file that the tests know, by name."""

from tests.weights.peer_files import broken_rows, hugging_face_rows, official_rows, timm_rows
from tests.weights.peer_files.row import Row

ROWS: dict[str, Row] = {
    row.name: row
    for row in (*hugging_face_rows.ROWS, *timm_rows.ROWS, *official_rows.ROWS, *broken_rows.ROWS)
}
