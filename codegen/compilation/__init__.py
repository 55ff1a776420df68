"""The build of a selection of FLASH_ATTN_*: compiler, ninja, the step that it runs, library and build log."""
