//! Event files are read back by a parser that shares nothing with the writer.

use std::path::PathBuf;

use super::super::{GridOptions, Images, grid};
use super::*;

/// CRC-32C (Castagnoli), bit by bit: RFC 3720, appendix B.4, gives its known answers.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = !0_u32;
    for &byte in bytes {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    !crc
}

/// TFRecord: rotated right by 15 bits, plus a constant.
fn masked(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The payloads of a record file whose checksums all hold.
fn records(mut file: &[u8]) -> Vec<Vec<u8>> {
    let mut records = Vec::new();
    while !file.is_empty() {
        let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        assert_eq!(u32::from_le_bytes(file[8..12].try_into().unwrap()), masked(&file[..8]));
        let payload = &file[12..12 + length];
        assert_eq!(u32::from_le_bytes(file[12 + length..16 + length].try_into().unwrap()), masked(payload));
        records.push(payload.to_vec());
        file = &file[16 + length..];
    }
    records
}

/// A protocol buffer field: number and value.
#[derive(Clone, Debug, PartialEq)]
enum Field {
    Varint(u64),
    Fixed64(u64),
    Bytes(Vec<u8>),
    Fixed32(u32),
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..).step_by(7) {
        let byte = bytes[0];
        *bytes = &bytes[1..];
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            break;
        }
    }
    value
}

fn fields(mut bytes: &[u8]) -> Vec<(u64, Field)> {
    let mut fields = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let mut take = |n: usize| {
            let (head, tail) = bytes.split_at(n);
            bytes = tail;
            head.to_vec()
        };
        let field = match key & 7 {
            1 => Field::Fixed64(u64::from_le_bytes(take(8).try_into().unwrap())),
            5 => Field::Fixed32(u32::from_le_bytes(take(4).try_into().unwrap())),
            2 => {
                let length = varint(&mut bytes) as usize;
                let (head, tail) = bytes.split_at(length);
                bytes = tail;
                Field::Bytes(head.to_vec())
            }
            0 => Field::Varint(varint(&mut bytes)),
            wire => panic!("wire type {wire}"),
        };
        fields.push((key >> 3, field));
    }
    fields
}

fn get(message: &[u8], number: u64) -> Vec<Field> {
    fields(message).into_iter().filter(|(n, _)| *n == number).map(|(_, field)| field).collect()
}

fn one(message: &[u8], number: u64) -> Field {
    let found = get(message, number);
    assert_eq!(found.len(), 1, "field {number}");
    found[0].clone()
}

fn bytes(message: &[u8], number: u64) -> Vec<u8> {
    match one(message, number) {
        Field::Bytes(bytes) => bytes,
        other => panic!("{other:?}"),
    }
}

fn read(path: &Path) -> Vec<Vec<u8>> {
    records(&fs::read(path).unwrap())
}

#[test]
fn crc32c_known_answers() {
    assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    assert_eq!(tensorboard_rs::masked_crc32c::masked_crc32c(b"123456789"), masked(b"123456789"));
}

#[test]
fn a_file_starts_with_its_version() {
    let folder = tempfile::tempdir().unwrap();
    let before = machine::since_1970().as_secs_f64();
    let board = TensorBoard::create(&folder.path().join("deep/tb"), 0).unwrap();
    let name = board.path().file_name().unwrap().to_str().unwrap().to_owned();
    let parts: Vec<&str> = name.split('.').collect();
    assert_eq!(parts[..3], ["events", "out", "tfevents"]);
    assert!(parts[3].len() == 10 && parts[3].parse::<u64>().unwrap() >= before as u64, "{name}");
    assert!(name.ends_with(&format!(".{}.{}.0", host_name(), std::process::id())), "{name}");

    let events = read(board.path());
    assert_eq!(events.len(), 1);
    assert_eq!(bytes(&events[0], 3), b"brain.Event:2");
    let Field::Fixed64(wall) = one(&events[0], 1) else { panic!("wall time") };
    assert!((before..=machine::since_1970().as_secs_f64()).contains(&f64::from_bits(wall)));
}

#[test]
fn scalars_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let mut board = TensorBoard::create(folder.path(), 0).unwrap();
    let steps = [1, 127, 128, 300, u64::from(u32::MAX) + 5];
    for (i, &step) in steps.iter().enumerate() {
        board.scalars(step, &[("loss", 0.5 / (i + 1) as f64), ("optim/lr", f64::NAN)]).unwrap();
    }
    board.flush().unwrap();
    let events = read(board.path());
    assert_eq!(events.len(), 1 + steps.len());
    for (i, (&step, event)) in steps.iter().zip(&events[1..]).enumerate() {
        assert_eq!(one(event, 2), Field::Varint(step));
        let summary = bytes(event, 5);
        let values = get(&summary, 1);
        let [Field::Bytes(loss), Field::Bytes(lr)] = values.as_slice() else { panic!("{values:?}") };
        assert_eq!(bytes(loss, 1), b"loss");
        assert_eq!(one(loss, 2), Field::Fixed32((0.5 / (i + 1) as f32).to_bits()));
        assert_eq!(bytes(lr, 1), b"optim/lr");
        let Field::Fixed32(lr) = one(lr, 2) else { panic!("lr") };
        assert!(f32::from_bits(lr).is_nan());
    }
}

#[test]
fn images_read_back() {
    let folder = tempfile::tempdir().unwrap();
    let mut board = TensorBoard::create(folder.path(), 0).unwrap();
    for channels in [1, 3] {
        let pixels: Vec<f32> = (0..2 * 3 * 5 * channels).map(|i| (i as f32 * 0.37).sin()).collect();
        let options = GridOptions { columns: Some(2), upscale: Some(1) };
        let picture = grid(&Images::new(&pixels, [2, 3, 5, channels]).unwrap(), &options);
        board.image("samples", 7, &picture).unwrap();
        board.flush().unwrap();
        let event = read(board.path()).pop().unwrap();
        assert_eq!(one(&event, 2), Field::Varint(7));
        let value = bytes(&bytes(&event, 5), 1);
        assert_eq!(bytes(&value, 1), b"samples");
        let image = bytes(&value, 4);
        assert_eq!(one(&image, 1), Field::Varint(7)); // 2 + 3 + 2 high
        assert_eq!(one(&image, 2), Field::Varint(16)); // 2 + 5 + 2 + 5 + 2 wide
        assert_eq!(one(&image, 3), Field::Varint(channels as u64));
        let decoded = image::load_from_memory(&bytes(&image, 4)).unwrap();
        assert_eq!(decoded.as_bytes(), picture.pixels());
    }
}

#[test]
fn every_start_has_its_own_file_and_a_resume_says_from_where() {
    let folder = tempfile::tempdir().unwrap();
    let paths: Vec<PathBuf> = (0..3)
        .map(|start| {
            let mut board = TensorBoard::create(folder.path(), start * 100).unwrap();
            board.scalars(start * 100 + 1, &[("loss", 1.0)]).unwrap();
            board.path().to_owned()
        })
        .collect();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3);
    // What is dropped is flushed.
    assert_eq!(paths.iter().map(|path| read(path).len()).collect::<Vec<_>>(), [2, 3, 3]);
    let restart = &read(&paths[2])[1];
    assert_eq!(one(restart, 2), Field::Varint(201));
    assert_eq!(one(&bytes(restart, 7), 1), Field::Varint(1));
}

#[test]
fn a_folder_that_cannot_be_made_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("tb"), "").unwrap();
    let error = TensorBoard::create(&folder.path().join("tb"), 0).unwrap_err().to_string();
    assert!(error.starts_with(&format!("cannot create folder `{}/tb`: ", folder.path().display())), "{error}");
}
