//! Bytes as NumPy 2 writes them, and what happens to files that are not arrays.

use super::*;
use std::fs;

/// `numpy.save(f, numpy.zeros((2, 28, 28, 1), '<f4'))` of NumPy 2.4.6, the bytes before the data.
const NUMPY_HEADER: &[u8] = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, \
'shape': (2, 28, 28, 1), }                                                  \n";

#[test]
fn the_header_is_numpys_byte_for_byte() {
    assert_eq!(NUMPY_HEADER.len(), 128);
    assert_eq!(header("<f4", &[2, 28, 28, 1]), NUMPY_HEADER);
    for shape in [&[][..], &[7], &[1, 2], &[usize::MAX; 9]] {
        assert_eq!(header("|u1", shape).len() % 64, 0);
    }
    assert!(String::from_utf8_lossy(&header("|u1", &[7])[10..]).contains("'shape': (7,), }"));
}

#[test]
fn arrays_read_back_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("new/x.npy");
    let mut values: Vec<f32> = (0..2 * 3 * 4 * 3).map(|i| (i as f32 * 0.3).sin() * 10.0).collect();
    values[0] = f32::NAN;
    values[1] = f32::NEG_INFINITY;
    values[2] = -0.0;
    write_npy(&path, &values, &[2, 3, 4, 3]).unwrap();
    let bytes = fs::read(&path).unwrap();
    assert_eq!(bytes.len(), 128 + 4 * values.len());
    assert_eq!(bytes[128 + 8..128 + 12], [0, 0, 0, 0x80]);
    let (read, shape) = read_npy(&path).unwrap();
    assert_eq!(shape, [2, 3, 4, 3]);
    assert!(read.iter().zip(&values).all(|(a, b)| a.to_bits() == b.to_bits()));
}

fn parse(bytes: &[u8]) -> Result<(Vec<f32>, Vec<usize>), ReportError> {
    parse_npy(Path::new("x.npy"), bytes)
}

fn file(version: u8, dictionary: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend([version, 0]);
    match version {
        1 => bytes.extend((dictionary.len() as u16).to_le_bytes()),
        _ => bytes.extend((dictionary.len() as u32).to_le_bytes()),
    }
    bytes.extend(dictionary.as_bytes());
    bytes.extend(data);
    bytes
}

#[test]
fn what_other_programs_write_is_read() {
    let doubles: Vec<u8> = [0.5_f64, -2.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    // Other spacing and order of keys, later versions, f64, no dimension at all.
    for text in [
        "{'shape':(2,1),'fortran_order':False,'descr':'<f8'}\n",
        "{\"shape\": (2, 1), \"descr\": \"<f8\", \"fortran_order\": False}",
    ] {
        let bytes = file(2, text, &doubles);
        assert_eq!(parse(&bytes).unwrap(), (vec![0.5, -2.0], vec![2, 1]));
    }
    let bytes = file(3, "{'descr': '<f4', 'fortran_order': False, 'shape': (), }\n", &1.5_f32.to_le_bytes());
    assert_eq!(parse(&bytes).unwrap(), (vec![1.5], vec![]));
}

#[test]
fn files_that_are_no_such_array() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.npy");
    let message = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let message = read_npy(&path).unwrap_err().to_string();
        message.strip_prefix(&format!("`{}` cannot be used: ", path.display())).unwrap().to_owned()
    };
    let good = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }\n";
    assert!(message(b"PNG").starts_with("not a .npy file: expected \\x93NUMPY, found [50, 4e, 47]"));
    assert!(message(&file(9, good, &[0; 8])).contains("expected format version 1, 2 or 3, found 9"));
    assert_eq!(
        message(&file(1, &good.replace("<f4", "|u1"), &[0; 2])),
        "expected an array of float32 (save x.astype('<f4')), found dtype '|u1'"
    );
    assert_eq!(
        message(&file(1, &good.replace("False", "True"), &[0; 8])),
        "expected an array in C order (save numpy.ascontiguousarray(x)), found Fortran order"
    );
    assert_eq!(
        message(&file(1, good, &[0; 7])),
        "expected as much data as the header says, found 7 bytes for shape [2]"
    );
    assert_eq!(
        message(&file(1, good, &[0; 9])),
        "expected as much data as the header says, found 9 bytes for shape [2]"
    );
    let negative = message(&file(1, &good.replace("(2,)", "(-2,)"), &[0; 8]));
    assert!(negative.contains("expected a non-negative integer that fits 64 bits, found \"-2,"), "{negative}");
    let huge = good.replace("(2,)", "(4294967296, 4294967296)");
    assert!(message(&file(1, &huge, &[0; 8])).starts_with("expected as much data as the header says"));
    // Cut anywhere, it is refused, never a panic.
    let whole = file(1, good, &[0; 8]);
    for length in 0..whole.len() {
        assert!(parse(&whole[..length]).is_err(), "cut at {length}");
    }
    assert!(matches!(read_npy(&folder.path().join("none.npy")), Err(ReportError::Io { action: "read", .. })));
    let error = read_npy(folder.path()).unwrap_err().to_string();
    assert!(error.contains("it is a folder, not a regular file"), "{error}");
}

#[test]
fn a_shape_that_does_not_fit_is_refused() {
    let error = write_npy(Path::new("x.npy"), &[0.0; 5], &[2, 3]).unwrap_err().to_string();
    assert_eq!(error, "cannot encode `x.npy`: 5 values are not an array of shape [2, 3]");
}

#[test]
fn npz_holds_u8_under_the_name_fid_tools_expect() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("samples.npz");
    let values: Vec<f32> = (0..2 * 3 * 4 * 3).map(|i| (i as f32 * 3.5) / 127.5 - 1.0).collect();
    write_npz(&path, &Images::new(&values, [2, 3, 4, 3]).unwrap()).unwrap();
    let mut archive = zip::ZipArchive::new(fs::File::open(&path).unwrap()).unwrap();
    assert_eq!(archive.len(), 1);
    let mut bytes = Vec::new();
    archive.by_name("arr_0.npy").unwrap().read_to_end(&mut bytes).unwrap();
    let head = header("|u1", &[2, 3, 4, 3]);
    assert_eq!(bytes[..head.len()], head);
    // 3.5·i rounds half up, 3.5 → 4; f32 may land just beside the half, so compare with the f64 value.
    for (i, &byte) in bytes[head.len()..].iter().enumerate() {
        assert!((f64::from(byte) - 3.5 * i as f64).abs() <= 0.5 + 1e-4, "{i}: {byte}");
    }
    assert_eq!(bytes.len() - head.len(), values.len());
}
