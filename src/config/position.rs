//! Which bytes of a TOML text hold which key.

use std::ops::Range;

use toml_edit::{Document, Item, Key, Table, TableLike, Value};

use super::Place;

/// One key or list element of a text.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    /// The full key, list elements by their index: `model.channels[1]`.
    pub path: String,
    /// The bytes of the key itself; `None` for a list element.
    pub key: Option<Range<usize>>,
    /// The bytes of the value; for a `[section]`, those of its header.
    pub value: Option<Range<usize>>,
}

/// Every key of `text`, parents before children; empty if the text is not TOML.
pub(super) fn index(text: &str) -> Vec<Entry> {
    let mut entries = Vec::new();
    if let Ok(document) = Document::parse(text) {
        table(document.as_table(), "", &mut entries);
    }
    entries
}

/// The line and column (from 1) at which `key` (`optim.lr`, `model.channels[1]`) stands in `text`.
pub fn locate(text: &str, key: &str) -> Option<(usize, usize)> {
    let entry = index(text).into_iter().find(|entry| entry.path == key)?;
    let span = entry.key.or(entry.value)?;
    Some(line_column(text, span.start))
}

/// The full key whose name or value holds the bytes `span`; empty for the document itself.
pub(super) fn key_at(text: &str, span: &Range<usize>) -> String {
    let holds = |outer: &Option<Range<usize>>| {
        outer.as_ref().is_some_and(|outer| outer.start <= span.start && span.end <= outer.end && !outer.is_empty())
    };
    // Children come after their parents, so the last entry that holds the span is the deepest.
    let deepest = index(text).into_iter().rev().find(|entry| holds(&entry.key) || holds(&entry.value));
    deepest.map(|entry| entry.path).unwrap_or_default()
}

/// A span of the text `origin` as a place.
pub(super) fn place(origin: &str, text: &str, span: Range<usize>) -> Place {
    let (line, column) = line_column(text, span.start);
    Place::file(origin, line, column)
}

/// Line and column, both from 1, the column in characters, of a byte offset.
fn line_column(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset.min(text.len())).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

fn table(table: &dyn TableLike, prefix: &str, entries: &mut Vec<Entry>) {
    for (name, _) in table.iter() {
        if let Some((key, item)) = table.get_key_value(name) {
            let path = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}.{name}") };
            item_entries(path, Some(key), item, entries);
        }
    }
}

fn item_entries(path: String, key: Option<&Key>, item: &Item, entries: &mut Vec<Entry>) {
    entries.push(Entry { path: path.clone(), key: key.and_then(Key::span), value: item.span() });
    match item {
        Item::Table(child) => table(child, &path, entries),
        Item::ArrayOfTables(tables) => {
            for (i, child) in tables.iter().enumerate() {
                let path = format!("{path}[{i}]");
                entries.push(Entry { path: path.clone(), key: None, value: Table::span(child) });
                table(child, &path, entries);
            }
        }
        Item::Value(child) => value_children(&path, child, entries),
        Item::None => {}
    }
}

fn value_children(path: &str, value: &Value, entries: &mut Vec<Entry>) {
    match value {
        Value::InlineTable(child) => table(child, path, entries),
        Value::Array(array) => {
            for (i, element) in array.iter().enumerate() {
                let path = format!("{path}[{i}]");
                entries.push(Entry { path: path.clone(), key: None, value: element.span() });
                value_children(&path, element, entries);
            }
        }
        _ => {}
    }
}
