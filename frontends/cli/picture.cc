// SPDX-License-Identifier: Apache-2.0

#include "dsd/frontends/cli/picture.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <ostream>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "dsd/core/base/env.h"
#include "dsd/core/base/status_macros.h"
#include "dsd/frontends/cli/value_text.h"

namespace dsd::cli {
namespace {

// Two decimals at most, without useless zeros.
std::string Px(double value) {
  std::string text = absl::StrFormat("%.2f", value);
  while (text.back() == '0') text.pop_back();
  if (text.back() == '.') text.pop_back();
  return text == "-0" ? "0" : text;
}

std::string Escape(absl::string_view text) {
  return absl::StrReplaceAll(
      text, {{"&", "&amp;"}, {"<", "&lt;"}, {">", "&gt;"}, {"\"", "&quot;"}});
}

bool IsContinuation(char c) {
  return (static_cast<unsigned char>(c) & 0xC0) == 0x80;
}

}  // namespace

std::string ColourOf(int64_t number) {
  static constexpr const char* kColours[] = {
      "#5b8ff9", "#f6903d", "#61c787", "#e8684a", "#9270ca",
      "#6dc8ec", "#f6bd16", "#ff99c3", "#269a99", "#b08968"};
  constexpr int64_t kCount = std::size(kColours);
  if (number < kCount) return kColours[number];
  // Steps of the golden angle are never the same.
  const double hue = std::fmod(static_cast<double>(number) * 137.508, 360);
  return absl::StrFormat("hsl(%.0f,%d%%,%d%%)", hue,
                         45 + static_cast<int>(number % 3) * 12,
                         58 + static_cast<int>(number % 4) * 6);
}

double Picture::WidthOf(absl::string_view text, double font_size) {
  const auto characters = std::count_if(
      text.begin(), text.end(), [](char c) { return !IsContinuation(c); });
  return static_cast<double>(characters) * font_size * 0.58;
}

void Picture::AddBox(const Area& area, absl::string_view fill,
                     absl::string_view hint, const Stroke& stroke) {
  absl::StrAppend(&body_, "<rect x=\"", Px(area.x), "\" y=\"", Px(area.y),
                  "\" width=\"", Px(area.width), "\" height=\"",
                  Px(area.height), "\" fill=\"", fill, "\"");
  if (stroke.colour != "none") {
    absl::StrAppend(&body_, " stroke=\"", stroke.colour, "\" stroke-width=\"",
                    Px(stroke.width), "\"");
  }
  if (hint.empty()) {
    absl::StrAppend(&body_, "/>\n");
  } else {
    absl::StrAppend(&body_, "><title>", Escape(hint), "</title></rect>\n");
  }
}

void Picture::AddText(double x, double y, absl::string_view text, double room,
                      const Font& font) {
  std::string shown(text);
  if (WidthOf(shown, font.size) > room) {
    while (!shown.empty() && WidthOf(shown, font.size) + font.size > room) {
      while (IsContinuation(shown.back())) shown.pop_back();
      shown.pop_back();
    }
    if (shown.empty()) return;
    shown += "…";
  }
  absl::StrAppend(&body_, "<text x=\"", Px(x), "\" y=\"", Px(y),
                  "\" font-size=\"", Px(font.size), "\" fill=\"", font.colour,
                  "\"");
  if (font.bold) absl::StrAppend(&body_, " font-weight=\"600\"");
  if (font.anchor != Anchor::kStart) {
    absl::StrAppend(&body_, " text-anchor=\"",
                    font.anchor == Anchor::kEnd ? "end" : "middle", "\"");
  }
  if (font.halo) absl::StrAppend(&body_, " class=\"halo\"");
  absl::StrAppend(&body_, ">", Escape(shown), "</text>\n");
}

std::string Picture::Elements(absl::string_view attributes) const {
  return absl::StrCat(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 ", Px(width_),
      " ", Px(height_), "\" ", attributes,
      " font-family=\"system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif\">\n"
      "<style>text{pointer-events:none}.halo{paint-order:stroke;stroke:#fff;"
      "stroke-opacity:.75;stroke-width:3px;stroke-linejoin:round}"
      "rect:hover{opacity:.8}</style>\n"
      "<rect width=\"100%\" height=\"100%\" fill=\"#fff\" "
      "style=\"opacity:1\"/>\n",
      body_, "</svg>\n");
}

std::string Picture::Svg() const {
  return Elements(
      absl::StrCat("width=\"", Px(width_), "\" height=\"", Px(height_), "\""));
}

std::string Picture::Html(absl::string_view title) const {
  return absl::StrCat(
      "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
      "<meta name=\"viewport\" content=\"width=device-width\">\n<title>",
      Escape(title),
      "</title>\n<style>body{margin:0;background:#fff}svg{display:block;"
      "margin:auto;width:100%;max-width:",
      Px(width_), "px;height:auto}</style>\n</head>\n<body>\n", Elements(""),
      "</body>\n</html>\n");
}

absl::Status WritePicture(const Picture& picture, absl::string_view title,
                          const std::string& path, Context& context) {
  const bool is_page =
      absl::EndsWith(path, ".html") || absl::EndsWith(path, ".htm");
  const std::string text = is_page ? picture.Html(title) : picture.Svg();
  if (path == "-") {
    context.out << text;
    return absl::OkStatus();
  }
  FileSystem& files = context.env->files();
  // A rename would put a file in the place of /dev/null.
  const absl::StatusOr<FileInfo> there = files.Stat(path);
  if (there.ok() && there->kind != FileKind::kRegular) {
    return absl::FailedPreconditionError(
        absl::StrCat("\"", Printable(path),
                     "\" is there and no regular file; choose another name, "
                     "or - for the output"));
  }
  const std::string unfinished =
      absl::StrCat(path, ".", context.env->RandomSeed() % 1000000, ".part");
  const auto write = [&]() -> absl::Status {
    DSD_ASSIGN_OR_RETURN(const std::unique_ptr<WritableFile> file,
                         files.CreateWritable(unfinished));
    DSD_RETURN_IF_ERROR(file->WriteAt(
        0, absl::MakeConstSpan(reinterpret_cast<const std::byte*>(text.data()),
                               text.size())));
    DSD_RETURN_IF_ERROR(file->Close());
    return files.Rename(unfinished, path);
  };
  absl::Status status = write();
  if (!status.ok()) files.Remove(unfinished).IgnoreError();
  return status;
}

}  // namespace dsd::cli
