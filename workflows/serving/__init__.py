"""Pictures over HTTP, drawn by the champion."""
