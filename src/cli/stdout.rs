//! Results go to stdout, everything else to stderr.

use super::exit::{Code, Failure};
use std::io::{self, ErrorKind, Write};

/// Prints a result. A reader that has seen enough (`| head`) is no failure; a full disk is one.
pub(super) fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::new(Code::Failed, format!("cannot write the result to stdout: {error}")))
        }
        _ => Ok(()),
    }
}

/// Prints a result as indented JSON.
pub(super) fn print_json(result: &impl serde::Serialize) -> Result<(), Failure> {
    print(&json(result)?)
}

/// A result as indented JSON with a newline at the end.
pub(super) fn json(result: &impl serde::Serialize) -> Result<String, Failure> {
    match serde_json::to_string_pretty(result) {
        Ok(text) => Ok(text + "\n"),
        Err(error) => Err(Failure::new(Code::Failed, format!("cannot write the result as JSON: {error}"))),
    }
}

/// `35746307` as `35,746,307`.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Lines of columns, each as wide as its widest cell: the first `left` columns to the left, numbers to the right.
pub(super) fn table(rows: &[Vec<String>], left: usize) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|c| c.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).enumerate();
        let line: Vec<String> = cells
            .map(|(i, (cell, &width))| if i < left { format!("{cell:width$}") } else { format!("{cell:>width$}") })
            .collect();
        text.push_str("  ");
        text.push_str(line.join("  ").trim_end());
        text.push('\n');
    }
    text
}
