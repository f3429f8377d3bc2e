"""Everything in results/ beside the paper's tables and figures."""
