"""Programs that show what the others do; what they need is read when they run."""

from fastdllm.cli import main_of

COMMANDS = {
    "view": main_of("fastdllm.demo.view", "Write a page that plays the traces of a run."),
    "chat": main_of("fastdllm.demo.chat", "Talk to a model, in the terminal or with --web in the browser."),
}
