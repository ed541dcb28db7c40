"""An OpenAI-compatible server for bundles: videos, chats, streams and a page that shows what was kept."""
