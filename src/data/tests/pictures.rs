//! Folders of pictures: order, conversion, scaling, and bad pictures.

use image::codecs::jpeg::JpegEncoder;
use image::{ExtendedColorType, ImageBuffer, Luma, LumaA, Rgb, Rgba};

use super::*;

fn config(place: &Place, side: usize, channels: usize) -> DataConfig {
    DataConfig { size: Some(ImageSize::square(side)), channels: Some(channels), ..place.config("p") }
}

/// The one image of the folder `p`.
fn only(config: &DataConfig) -> Vec<u8> {
    let dataset = Dataset::open(config, None, &()).unwrap();
    assert_eq!(dataset.len(), 1);
    all(&dataset)
}

fn jpeg(pixels: &[u8], height: u32, width: u32) -> Vec<u8> {
    let color = if pixels.len() as u32 == height * width { ExtendedColorType::L8 } else { ExtendedColorType::Rgb8 };
    let mut bytes = Vec::new();
    JpegEncoder::new_with_quality(&mut bytes, 95).encode(pixels, width, height, color).unwrap();
    bytes
}

#[test]
fn pictures_come_in_the_order_of_their_paths_and_others_are_left_alone() {
    let place = Place::new();
    for (name, value) in [("b.png", 3), ("a/z.PNG", 2), ("a/b/c.png", 1), ("c.png", 4)] {
        // `save_buffer` knows extensions in either case.
        save_picture(&place.path(&format!("p/{name}")), &[value; 16], 4, 4);
    }
    place.write("p/notes.txt", b"not a picture");
    place.write("p/._b.png", b"what macOS leaves behind");
    place.write("p/.thumbnails/x.png", b"hidden");
    std::os::unix::fs::symlink(place.path("p"), place.path("p/a/loop")).unwrap();
    save_picture(&place.path("elsewhere/d.png"), &[5; 16], 4, 4);
    std::os::unix::fs::symlink(place.path("elsewhere"), place.path("p/d")).unwrap();
    let dataset = Dataset::open(&config(&place, 4, 1), None, &()).unwrap();
    let first: Vec<u8> = all(&dataset).chunks(16).map(|image| image[0]).collect();
    assert_eq!(first, [1, 2, 3, 4, 5]);

    // Renamed in the same order, touched, moved: the same data set. Another order: another.
    let before = dataset.fingerprint();
    fs::rename(place.path("p/c.png"), place.path("p/cc.png")).unwrap();
    fs::remove_file(place.path("p/a/loop")).unwrap();
    fs::rename(place.path("p"), place.path("q")).unwrap();
    let moved = DataConfig { path: place.path("q"), ..config(&place, 4, 1) };
    assert_eq!(Dataset::open(&moved, None, &()).unwrap().fingerprint(), before);
    fs::rename(place.path("q/cc.png"), place.path("q/a/a.png")).unwrap();
    assert_ne!(Dataset::open(&moved, None, &()).unwrap().fingerprint(), before);
    // A link to nothing may have been a whole folder: it is not passed over.
    std::os::unix::fs::symlink(place.path("nowhere"), place.path("q/e")).unwrap();
    let error = Dataset::open(&moved, None, &()).unwrap_err().to_string();
    assert!(error.contains("q/e") && error.contains("follow the link"), "{error}");
    for cache_limit in [ByteSize(0), ByteSize(1 << 20)] {
        let skip = DataConfig { on_bad_image: OnBadImage::Skip, cache_limit, ..moved.clone() };
        for _ in 0..2 {
            let dataset = Dataset::open(&skip, None, &()).unwrap();
            assert_eq!((dataset.len(), dataset.skipped()), (5, 1));
            let name = &dataset.skipped_names()[0];
            assert!(name.contains("q/e") && name.contains("a link to nothing"), "{name}");
        }
    }
}

#[test]
fn colours_are_converted_as_documented() {
    let place = Place::new();
    let path = place.path("p/x.png");
    // Exact without scaling.
    let colour = noise(5 * 5 * 3, 1);
    save_picture(&path, &colour, 5, 5);
    assert_eq!(only(&config(&place, 5, 3)), colour);
    let grey: Vec<u8> = colour
        .chunks(3)
        .map(|p| (0.2126 * f64::from(p[0]) + 0.7152 * f64::from(p[1]) + 0.0722 * f64::from(p[2])) as u8)
        .collect();
    for (found, expected) in only(&config(&place, 5, 1)).iter().zip(grey) {
        assert!(found.abs_diff(expected) <= 1, "{found} for {expected}"); // rounded or truncated
    }
    save_picture(&path, &colour[..25], 5, 5);
    assert_eq!(only(&config(&place, 5, 1)), colour[..25]);
    assert_eq!(only(&config(&place, 5, 3)), colour[..25].iter().flat_map(|v| [*v; 3]).collect::<Vec<_>>());

    // Transparent is white; half of 100 over white is (100·128 + 255·127)/255 = 177.2.
    let pixels = [[9, 9, 9, 0], [100, 200, 0, 255], [100, 0, 255, 128], [0, 0, 0, 255]];
    ImageBuffer::<Rgba<u8>, _>::from_raw(2, 2, pixels.concat()).unwrap().save(&path).unwrap();
    assert_eq!(only(&config(&place, 2, 3)), [255, 255, 255, 100, 200, 0, 177, 127, 255, 0, 0, 0]);
    ImageBuffer::<LumaA<u8>, _>::from_raw(2, 1, vec![7, 255, 7, 0]).unwrap().save(&path).unwrap();
    assert_eq!(only(&DataConfig { size: Some(ImageSize { height: 1, width: 2 }), ..config(&place, 1, 1) }), [7, 255]);

    // 16 bits: v·255/65535, rounded.
    let deep: Vec<u16> = vec![0, 128, 129, 257, 32767, 32896, 65406, 65535, 40000];
    ImageBuffer::<Luma<u16>, _>::from_raw(3, 3, deep.clone()).unwrap().save(&path).unwrap();
    let expected: Vec<u8> = deep.iter().map(|v| (f64::from(*v) * 255.0 / 65535.0).round() as u8).collect();
    assert_eq!(only(&config(&place, 3, 1)), expected);
    let deep_colour: Vec<u16> = deep.iter().flat_map(|v| [*v, 65535 - *v, 300]).collect();
    ImageBuffer::<Rgb<u16>, _>::from_raw(3, 3, deep_colour.clone()).unwrap().save(&path).unwrap();
    let expected: Vec<u8> = deep_colour.iter().map(|v| (f64::from(*v) * 255.0 / 65535.0).round() as u8).collect();
    assert_eq!(only(&config(&place, 3, 3)), expected);
}

#[test]
fn jpegs_are_read_whatever_their_name_and_turned_as_the_camera_was_held() {
    let place = Place::new();
    // Smooth, so that compression changes little: value = 4·row + 2·column.
    let (height, width) = (24, 32);
    let pixels: Vec<u8> = (0..height * width).map(|i| (4 * (i / width) + 2 * (i % width)) as u8).collect();
    let bytes = jpeg(&pixels, height, width);
    let path = place.write("p/x.png", &bytes); // named wrongly: told by its content
    let size = |height, width| DataConfig { size: Some(ImageSize { height, width }), ..config(&place, 1, 1) };
    let close = |found: &[u8], expected: &dyn Fn(usize, usize) -> usize, width: usize| {
        for (i, value) in found.iter().enumerate() {
            let expected = expected(i / width, i % width);
            assert!(usize::from(*value).abs_diff(expected) <= 3, "{value} for {expected} at {i}");
        }
    };
    close(&only(&size(24, 32)), &|row, column| 4 * row + 2 * column, 32);
    // EXIF orientation 6: the first row of the file is the right edge of the picture.
    let tiff = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0";
    let mut turned = vec![0xff, 0xd8, 0xff, 0xe1];
    turned.extend((2 + 6 + tiff.len() as u16).to_be_bytes());
    turned.extend(b"Exif\0\0");
    turned.extend(tiff);
    turned.extend(&bytes[2..]);
    fs::remove_file(path).unwrap();
    place.write("p/x.jpeg", &turned);
    close(&only(&size(32, 24)), &|row, column| 4 * (23 - column) + 2 * row, 24);
    // Checked by its header alone, its sides are exchanged too.
    let lazy = DataConfig { cache_limit: ByteSize(0), ..size(32, 24) };
    close(&only(&lazy), &|row, column| 4 * (23 - column) + 2 * row, 24);
}

#[test]
fn scaling_covers_the_size_and_crops_the_centre() {
    let place = Place::new();
    let path = place.path("p/x.png");
    // Without scaling the crop is exact: 6×11 to 6×6 starts at column 2.
    let wide = noise(6 * 11, 1);
    save_picture(&path, &wide, 6, 11);
    let expected: Vec<u8> = wide.chunks(11).flat_map(|row| row[2..8].to_vec()).collect();
    assert_eq!(only(&config(&place, 6, 1)), expected);
    let tall = noise(11 * 6, 2);
    save_picture(&path, &tall, 11, 6);
    assert_eq!(only(&config(&place, 6, 1)), tall[2 * 6..8 * 6]);
    // Four to one: a ramp stays a ramp (the mean of each four), away from the edges, where the filter sees the border.
    let ramp: Vec<u8> = (0..64 * 160).map(|i| (i % 160) as u8).collect();
    save_picture(&path, &ramp, 64, 160);
    for row in only(&config(&place, 16, 1)).chunks(16) {
        for (column, value) in row.iter().enumerate() {
            let expected = 4.0 * (column as f64 + 12.0) + 1.5;
            assert!((f64::from(*value) - expected).abs() <= 1.0, "{value} for {expected}");
        }
    }
    // Sizes that do not divide: a constant stays constant, the shape is right.
    for (height, width) in [(17, 23), (23, 17), (7, 100), (100, 7), (7, 7)] {
        save_picture(&path, &vec![99; height * width * 3], height as u32, width as u32);
        assert_eq!(only(&config(&place, 7, 3)), vec![99; 7 * 7 * 3]);
        let oblong = DataConfig { size: Some(ImageSize { height: 5, width: 7 }), ..config(&place, 1, 3) };
        assert_eq!(only(&oblong), vec![99; 5 * 7 * 3]);
    }
}

#[test]
fn a_bad_picture_is_named_or_left_out() {
    let good: Vec<Vec<u8>> = (0..3).map(|i| noise(20 * 20 * 3, i)).collect();
    let png = {
        let place = Place::new();
        save_picture(&place.path("x.png"), &good[0], 20, 20);
        fs::read(place.path("x.png")).unwrap()
    };
    let jpeg = jpeg(&good[0], 20, 20);
    let mut bomb = png.clone();
    bomb[16..24].copy_from_slice(&[0, 1, 0, 0, 0, 1, 0, 0]); // claims 65536×65536, with a checksum that holds
    let mut crc = flate2::Crc::new();
    crc.update(&bomb[12..29]);
    bomb[29..33].copy_from_slice(&crc.sum().to_be_bytes());
    let small = {
        let place = Place::new();
        save_picture(&place.path("x.png"), &good[0][..19 * 20 * 3], 19, 20);
        fs::read(place.path("x.png")).unwrap()
    };
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("truncated.png", png[..png.len() / 2].to_vec(), "cannot be decoded"),
        ("headless.png", png[..20].to_vec(), "cannot be decoded"),
        (
            "flipped.png",
            {
                let mut b = png.clone();
                b[70] ^= 0x55;
                b
            },
            "cannot be decoded",
        ),
        ("bomb.png", bomb, "claims 65536×65536 pixels"),
        ("truncated.jpg", jpeg[..jpeg.len() * 3 / 4].to_vec(), "cannot be decoded"),
        ("headless.jpg", jpeg[..30].to_vec(), "cannot be decoded"),
        ("garbage.jpg", b"<html>404</html>".to_vec(), "starts with [3c, 68, 74, 6d]"),
        ("gif.png", b"GIF89a\x01\0\x01\0\0\0\0;".to_vec(), "Gif"),
        ("empty.png", Vec::new(), "an empty file"),
        ("small.png", small, "a picture of 19×20, expected at least 20×20"),
    ];
    for (name, bytes, why) in cases {
        let place = Place::new();
        for (i, pixels) in good.iter().enumerate() {
            save_picture(&place.path(&format!("p/{}.png", ["a", "m", "z"][i])), pixels, 20, 20);
        }
        place.write(&format!("p/{name}"), &bytes);
        let stop = config(&place, 20, 3);
        let error = Dataset::open(&stop, None, &()).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(why) && error.contains("on_bad_image"), "{name}: {error}");
        let skip = DataConfig { on_bad_image: OnBadImage::Skip, ..stop.clone() };
        for again in [false, true] {
            let log = Log::default();
            let dataset = Dataset::open(&skip, None, &log).unwrap();
            assert_eq!((dataset.len(), dataset.skipped(), log.decoded()), (3, 1, !again), "{name}");
            assert_eq!(all(&dataset), good.concat(), "{name}");
            assert!(dataset.skipped_names()[0].contains(name), "{:?}", dataset.skipped_names());
        }
        // A header that is wrong is found out without decoding too.
        if ["headless.png", "bomb.png", "headless.jpg", "gif.png", "empty.png", "small.png"].contains(&name) {
            let lazy = |config: &DataConfig| DataConfig { cache_limit: ByteSize(0), ..config.clone() };
            assert!(Dataset::open(&lazy(&stop), None, &()).unwrap_err().to_string().contains(why), "{name}");
            let dataset = Dataset::open(&lazy(&skip), None, &()).unwrap();
            assert_eq!((dataset.len(), dataset.skipped()), (3, 1), "{name}");
        }
        // A cache made by skipping is not taken for one made without.
        assert!(Dataset::open(&stop, None, &()).is_err(), "{name}");
    }
}

#[test]
fn headers_are_checked_up_front_where_pictures_are_decoded_on_demand() {
    let place = Place::new();
    for (name, side) in [("a.png", 8), ("b.png", 4), ("c.png", 9)] {
        save_picture(&place.path(&format!("p/{name}")), &vec![1; side * side], side as u32, side as u32);
    }
    place.write("p/d.jpg", b"nothing");
    let stop = DataConfig { cache_limit: ByteSize(0), ..config(&place, 8, 1) };
    let error = Dataset::open(&stop, None, &()).unwrap_err().to_string();
    assert!(error.contains("b.png") && error.contains("4×4"), "{error}");
    let skip = DataConfig { on_bad_image: OnBadImage::Skip, ..stop };
    let dataset = Dataset::open(&skip, None, &()).unwrap();
    assert_eq!((dataset.len(), dataset.skipped(), dataset.storage()), (2, 2, Storage::OnDemand));
    assert!(dataset.skipped_names()[1].contains("d.jpg"));
    let cached = DataConfig { cache_limit: ByteSize(1 << 20), ..skip.clone() };
    let cached = Dataset::open(&cached, None, &()).unwrap();
    assert_eq!((cached.fingerprint(), all(&cached)), (dataset.fingerprint(), all(&dataset)));
    // None left.
    for name in ["a.png", "c.png"] {
        fs::remove_file(place.path(&format!("p/{name}"))).unwrap();
    }
    let error = Dataset::open(&skip, None, &()).unwrap_err().to_string();
    assert!(error.contains("none of them usable") && error.contains("b.png"), "{error}");
}

#[test]
fn every_byte_of_a_picture_counts() {
    // A JPEG large enough that its middle is far from both ends.
    let place = Place::new();
    let bytes = jpeg(&noise(300 * 300 * 3, 1), 300, 300);
    assert!(bytes.len() > 60_000);
    let path = place.write("p/a.jpg", &bytes);
    for cache_limit in [ByteSize(0), ByteSize(1 << 30)] {
        let config = DataConfig { cache_limit, ..config(&place, 64, 3) };
        let fingerprint = || Dataset::open(&config, None, &()).unwrap().fingerprint();
        fs::write(&path, &bytes).unwrap();
        let before = fingerprint();
        let mut changed = bytes.clone();
        let middle = bytes.len() / 2;
        changed[middle] = if bytes[middle] == 0x11 { 0x12 } else { 0x11 };
        fs::write(&path, &changed).unwrap();
        assert_ne!(fingerprint(), before);
        fs::write(&path, &bytes).unwrap();
        assert_eq!(fingerprint(), before);
    }
}
