//! A file that cannot be written is told of when that begins and when it ends, not at every try in between.

use super::{Console, ReportError};

/// What a person has been told about one file.
#[derive(Debug)]
pub struct FileAlarm {
    /// What the file is called in messages.
    name: &'static str,
    /// The last alarm, until the file is written again.
    raised: Option<String>,
}

impl FileAlarm {
    /// Nothing is wrong with the file called `name`.
    pub fn new(name: &'static str) -> FileAlarm {
        FileAlarm { name, raised: None }
    }

    /// Takes the outcome of a write. `behind`: it succeeded in so far as the file was not touched, and an earlier one still fails.
    pub fn note(&mut self, console: &Console, outcome: Result<(), ReportError>, behind: bool) {
        match outcome {
            Err(error) => {
                let text = error.to_string();
                // Another error than before is news: what waited is now lost, say.
                if self.raised.as_ref() != Some(&text) {
                    console.alarm(format!("{text}; the run goes on and tries again"));
                    self.raised = Some(text);
                }
            }
            Ok(()) if !behind && self.raised.take().is_some() => {
                console.all_clear(format!("{} is written again", self.name));
            }
            Ok(()) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::Duration;

    use super::super::Verbosity;
    use super::super::progress::tests::plain;
    use super::*;

    #[test]
    fn an_alarm_for_each_failure_and_not_for_each_try() {
        let full = || {
            let source = std::io::ErrorKind::StorageFull.into();
            Err(ReportError::Io { action: "write", path: PathBuf::from("log"), source })
        };
        let lost = || Err(ReportError::Backlog { path: PathBuf::from("log") });
        let (console, screen) = plain(Verbosity::Quiet, Duration::ZERO);
        let mut alarm = FileAlarm::new("log.jsonl");
        type Outcome = fn() -> Result<(), ReportError>;
        let rounds: [(Outcome, bool, &str); 9] = [
            (|| Ok(()), false, ""),
            (full, false, "warning: cannot write `log`"),
            (full, true, ""),
            (|| Ok(()), true, ""),
            (lost, true, "warning: `log` could not be written for so long"),
            (lost, true, ""),
            (|| Ok(()), false, "log.jsonl is written again"),
            (|| Ok(()), false, ""),
            (full, true, "warning: cannot write `log`"),
        ];
        for (round, (outcome, behind, expected)) in rounds.into_iter().enumerate() {
            let before = screen.text().len();
            alarm.note(&console, outcome(), behind);
            let said = screen.text()[before..].to_owned();
            assert_eq!(said.is_empty(), expected.is_empty(), "round {round}: {said}");
            assert!(said.starts_with(expected), "round {round}: {said}");
        }
    }
}
