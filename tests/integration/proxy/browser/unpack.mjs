// Unpacks the browser of the npm package into the folder for temporary files, and tells where it is.
import chromium from "@sparticuz/chromium";

console.log(await chromium.executablePath());
