//! One path, six meanings: what to write is told by how the path ends.

use std::fs;
use std::path::Path;

use super::grid::Picture;
use super::{GridOptions, Images, ReportError, grid, write_gif, write_npy, write_npz};

/// In which form images are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputFormat {
    /// One picture with all images.
    GridPng,
    /// An animation of such pictures.
    Gif,
    /// f32 [N, H, W, C] in [−1, 1].
    Npy,
    /// u8 [N, H, W, C] under the name `arr_0`.
    Npz,
    /// A PNG per image.
    Folder,
}

impl OutputFormat {
    /// The format of `path`: `.png`, `.gif`, `.npy`, `.npz`, or a folder if it ends with a slash or is one.
    ///
    /// # Errors
    /// The path says none of these.
    pub fn of(path: &Path) -> Result<OutputFormat, ReportError> {
        if path.as_os_str().as_encoded_bytes().ends_with(b"/") || path.is_dir() {
            return Ok(OutputFormat::Folder);
        }
        let extension = path.extension().map(|extension| extension.to_string_lossy().to_lowercase());
        match extension.as_deref() {
            Some("png") => Ok(OutputFormat::GridPng),
            Some("gif") => Ok(OutputFormat::Gif),
            Some("npy") => Ok(OutputFormat::Npy),
            Some("npz") => Ok(OutputFormat::Npz),
            _ => Err(ReportError::UnknownOutput { path: path.to_owned() }),
        }
    }
}

/// Most images of a grid or an animation: a picture of 64×64 images fills any screen.
const MOST: usize = 4096;

/// Whether `count` images make sense at `path`: to be asked before anything is done. Nothing is created yet.
///
/// # Errors
/// The format is unknown, a picture cannot show so many, or the folder holds images that would stay among the new ones.
pub fn check_output(path: &Path, count: usize) -> Result<OutputFormat, ReportError> {
    let format = OutputFormat::of(path)?;
    match format {
        OutputFormat::GridPng | OutputFormat::Gif if count > MOST => {
            return Err(ReportError::TooMany { path: path.to_owned(), count, most: MOST });
        }
        OutputFormat::Folder if path.is_dir() => {}
        _ => return Ok(format),
    }
    for entry in fs::read_dir(path).map_err(ReportError::io("read folder", path))? {
        let name = entry.map_err(ReportError::io("read folder", path))?.file_name().to_string_lossy().into_owned();
        if is_numbered(&name) && !is_new(&name, count) {
            return Err(ReportError::StaleImages { path: path.to_owned(), stale: name, count });
        }
    }
    Ok(format)
}

/// Writes images to `path` in the form its ending asks for ([`OutputFormat::of`]); missing folders are created.
///
/// `frames` are the stages of one batch, the finished one last. A `.gif` shows them all; all other forms hold the last.
///
/// # Errors
/// The format is unknown, there is no frame, or the file cannot be written.
pub fn write_images(path: &Path, frames: &[Images], options: &GridOptions) -> Result<(), ReportError> {
    let format = OutputFormat::of(path)?;
    let Some(last) = frames.last() else {
        return Err(ReportError::Encode { path: path.to_owned(), message: "there are no images".to_owned() });
    };
    match format {
        OutputFormat::GridPng => grid(last, options).write_png(path),
        OutputFormat::Gif => write_gif(path, &frames.iter().map(|frame| grid(frame, options)).collect::<Vec<_>>()),
        OutputFormat::Npy => write_npy(path, last.pixels(), &last.shape()),
        OutputFormat::Npz => write_npz(path, last),
        OutputFormat::Folder => write_folder(path, last, 0, last.shape()[0]),
    }
}

/// Writes a PNG per image into the folder `path`, as numbers `first`, `first` + 1, … of `total`, so that a large set can
/// be written batch by batch: `00000.png`, `00001.png`, …
///
/// # Errors
/// A file cannot be written.
pub fn write_folder(path: &Path, images: &Images, first: usize, total: usize) -> Result<(), ReportError> {
    let [_, h, w, c] = images.shape();
    for (i, image) in images.each().enumerate() {
        Picture::of(image, [h, w, c]).write_png(&path.join(image_name(first + i, total)))?;
    }
    Ok(())
}

/// Numbers of equal length, so that names sort as numbers do.
fn image_name(i: usize, total: usize) -> String {
    let digits = total.saturating_sub(1).to_string().len().max(5);
    format!("{i:0digits$}.png")
}

/// Whether one of `total` new images has this name.
fn is_new(name: &str, total: usize) -> bool {
    let number = name.strip_suffix(".png").and_then(|stem| stem.parse().ok());
    number.is_some_and(|i: usize| i < total && name == image_name(i, total))
}

fn is_numbered(name: &str) -> bool {
    name.strip_suffix(".png").is_some_and(|stem| !stem.is_empty() && stem.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::super::read_npy;
    use super::*;

    const PIXELS: [f32; 24] = [0.25; 24];

    fn images() -> Images<'static> {
        Images::new(&PIXELS, [3, 2, 4, 1]).unwrap()
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn the_ending_decides() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in ["a.png", "b.GIF", "c.npy", "d.npz", "e/", "f/g.png"] {
            check_output(&path(name), 3).unwrap();
            write_images(&path(name), &[images(), images()], &GridOptions::default()).unwrap();
        }
        assert_eq!(names(folder.path()), ["a.png", "b.GIF", "c.npy", "d.npz", "e", "f"]);
        assert_eq!(names(&path("e")), ["00000.png", "00001.png", "00002.png"]);
        assert_eq!(image::open(path("a.png")).unwrap().width(), 2 * (4 * 16 + 2) + 2);
        assert_eq!(image::open(path("e/00002.png")).unwrap().into_luma8().into_raw(), [159; 8]);
        assert_eq!(read_npy(&path("c.npy")).unwrap(), (PIXELS.to_vec(), vec![3, 2, 4, 1]));
        // An existing folder needs no slash, whatever it is called.
        fs::create_dir(path("odd.npy")).unwrap();
        write_images(&path("odd.npy"), &[images()], &GridOptions::default()).unwrap();
        assert_eq!(names(&path("odd.npy")).len(), 3);
    }

    #[test]
    fn checking_creates_nothing() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a/b.png", "a/", "a/b.npy"] {
            check_output(&folder.path().join(name), 3).unwrap();
        }
        assert!(names(folder.path()).is_empty());
        for (name, is_ok) in [("x.png", false), ("x.gif", false), ("x.npy", true), ("x.npz", true), ("x/", true)] {
            let path = folder.path().join(name);
            assert!(check_output(&path, MOST).is_ok(), "{name}");
            match check_output(&path, MOST + 1) {
                Err(ReportError::TooMany { count: 4097, .. }) => assert!(!is_ok, "{name}"),
                found => assert!(is_ok && found.is_ok(), "{name}"),
            }
        }
    }

    #[test]
    fn an_ending_that_decides_nothing() {
        for name in ["samples", "samples.jpg", "samples.tar.gz", ""] {
            let path = Path::new(name);
            let error = write_images(path, &[images()], &GridOptions::default()).unwrap_err();
            assert!(matches!(error, ReportError::UnknownOutput { .. }), "{error}");
        }
        assert_eq!(
            check_output(Path::new("samples.jpg"), 3).unwrap_err().to_string(),
            "cannot tell what to write to `samples.jpg`: end it with .png (one grid), .gif (an animation), .npy (f32 in \
             [-1, 1]), .npz (u8, as FID tools read it) or / (a folder of PNGs)"
        );
    }

    #[test]
    fn old_images_do_not_hide_among_new_ones() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("set/");
        write_images(&path, &[images()], &GridOptions::default()).unwrap();
        fs::write(path.join("notes.png"), "").unwrap();
        assert_eq!(check_output(&path, 3).unwrap(), OutputFormat::Folder);
        assert_eq!(check_output(&path, 4).unwrap(), OutputFormat::Folder);
        assert_eq!(
            check_output(&path, 2).unwrap_err().to_string(),
            format!(
                "folder `{}` holds `00002.png`, which 2 new images would not replace: empty it or name another folder",
                path.display()
            )
        );
    }

    #[test]
    fn batches_of_one_set() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("set");
        write_folder(&path, &images(), 0, 100_001).unwrap();
        write_folder(&path, &images(), 99_998, 100_001).unwrap();
        assert_eq!(
            names(&path),
            ["000000", "000001", "000002", "099998", "099999", "100000"].map(|n| format!("{n}.png"))
        );
    }

    #[test]
    fn no_images() {
        let error = write_images(Path::new("x.png"), &[], &GridOptions::default()).unwrap_err().to_string();
        assert_eq!(error, "cannot encode `x.png`: there are no images");
    }
}
