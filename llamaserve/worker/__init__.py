"""One child process per loaded model, and the messages that pass between it and the API process."""
