"""The schema's history (Alembic). `service.db.upgrade` applies it."""
