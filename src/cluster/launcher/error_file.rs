//! What a rank says of its failure, in a file that its launcher reads: torchrun's, or our own.
//!
//! The format is that of PyTorch's `torch.distributed.elastic.multiprocessing.errors`; torchrun shows the callstack, so the message stands
//! there, too.

use crate::files::{AtomicFile, Durability, open_regular};
use crate::machine::since_1970;
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// The variable that names the file.
pub const ERROR_FILE: &str = "TORCHELASTIC_ERROR_FILE";
/// More than any message; the rest is not read.
const MOST: u64 = 1 << 20;

#[derive(Serialize, Deserialize)]
struct ErrorFile {
    message: Error,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Error {
    Full {
        message: String,
        #[serde(rename = "extraInfo", default)]
        extra: Extra,
    },
    /// As PyTorch writes it for processes without a traceback.
    Text(String),
}

#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct Extra {
    py_callstack: String,
    /// Seconds since 1970, as text.
    timestamp: String,
    rank: Option<String>,
    exit_code: u8,
}

/// Where this process's launcher wants to read of a failure.
pub fn path_from_environment() -> Option<PathBuf> {
    std::env::var_os(ERROR_FILE).filter(|path| !path.is_empty()).map(PathBuf::from)
}

/// Writes down why this process fails; a reader finds all of it or nothing.
///
/// # Errors
/// The file cannot be written.
pub fn write(path: &Path, message: &str, exit_code: u8) -> io::Result<()> {
    let extra = Extra {
        py_callstack: message.to_string(),
        timestamp: since_1970().as_secs().to_string(),
        rank: std::env::var("RANK").ok(),
        exit_code,
    };
    let error = ErrorFile { message: Error::Full { message: message.to_string(), extra } };
    let mut file = AtomicFile::create(path)?;
    file.write_all(&serde_json::to_vec(&error)?)?;
    file.commit(Durability::Kill)
}

/// The message of a rank, if it left one that can be read.
pub(super) fn read(path: &Path) -> Option<String> {
    let mut text = String::new();
    open_regular(path).ok()?.take(MOST).read_to_string(&mut text).ok()?;
    match serde_json::from_str::<ErrorFile>(&text).ok()?.message {
        Error::Full { message, .. } | Error::Text(message) => Some(message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_is_as_torchrun_expects_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("error.json");
        write(&path, "no \"data\"\nhere", 3).unwrap();
        assert_eq!(read(&path).as_deref(), Some("no \"data\"\nhere"));
        let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(json["message"]["message"], "no \"data\"\nhere");
        let extra = &json["message"]["extraInfo"];
        assert_eq!((&extra["py_callstack"], &extra["exit_code"]), (&"no \"data\"\nhere".into(), &3.into()));
        // torchrun: int(message["extraInfo"]["timestamp"])
        assert!(extra["timestamp"].as_str().unwrap().parse::<u64>().unwrap() > 1_700_000_000, "{extra}");
        assert!(write(&dir.path().join("no/such/folder.json"), "x", 1).is_err());
    }

    #[test]
    fn files_of_others_are_read_as_far_as_they_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("error.json");
        assert_eq!(read(&path), None);
        assert_eq!(read(dir.path()), None, "a folder");
        for (text, message) in [
            (r#"{"message": "short", "timestamp": 3}"#, Some("short")),
            (r#"{"message": {"message": "long", "extraInfo": {"py_callstack": "c", "timestamp": "5"}}}"#, Some("long")),
            (r#"{"message": {"message": "bare"}}"#, Some("bare")),
            (r#"{"message": 3}"#, None),
            (r#"{"mess"#, None),
            ("", None),
        ] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(read(&path).as_deref(), message, "{text}");
        }
    }
}
